"""Pictures: their files and settings, the canvas, masks, and the autoencoder."""
