"""A feature network of one's own: trained on labelled images, for losses and metrics."""
