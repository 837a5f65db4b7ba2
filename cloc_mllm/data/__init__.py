"""Records, readers, batches: everything between files on disk and tensors."""
