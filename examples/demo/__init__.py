"""The demo: a FinetuneJob trains inside a serving endpoint while a real arrival trace is replayed through
an OpenAI client.
"""
