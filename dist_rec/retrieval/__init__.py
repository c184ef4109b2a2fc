"""From a trained model with two towers to an index that answers."""
