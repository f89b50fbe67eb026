"""Tokens as text: the bytes of each, where a text can be cut, an answer's text as it grows, what is text at all."""
