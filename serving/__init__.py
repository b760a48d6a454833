"""The server: requests of many clients share the denoising loop, step by step."""
