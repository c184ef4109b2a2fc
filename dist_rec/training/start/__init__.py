"""Starting from another run: what it was, what of it fits, what new domains begin as, and what stays as it was."""
