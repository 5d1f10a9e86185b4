"""GGUF, the one-file format of llama.cpp: models out to it and back, or an error that says what it cannot express."""
