"""What pruning costs and saves: perplexity, size, speed, samples."""
