"""The measurements that the documents quote, each a command."""
