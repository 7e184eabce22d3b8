"""Ready-made tasks. Nothing else in the package imports torchvision or transformers."""
