"""ONNX graphs: read and edited without the package onnx."""
