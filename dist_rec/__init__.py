"""dist_rec: distributed training of search-and-recommendation foundation models."""
