"""Networks of others: an autoencoder and the FID network."""
