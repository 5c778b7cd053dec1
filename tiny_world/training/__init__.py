"""The bundled tiny VLM, trained from scratch: a stock Llava, its tokenizer and a full CLIP for text relevance."""
