"""What is computed and where weights come from: GGUF files, configs, the float reference, recipes, a bundled model."""
