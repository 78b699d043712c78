"""Where training data comes from: the built-in world, video files, records, pipelines and the tokenizer."""
