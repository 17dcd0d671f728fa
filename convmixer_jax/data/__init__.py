"""Images from disk to batches on the host: uint8 RGB and integer labels."""
