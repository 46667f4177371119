"""Pictures in, batches on the device out. Knows nothing of networks or training."""
