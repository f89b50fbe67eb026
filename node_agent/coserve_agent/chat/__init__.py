"""From messages to tokens, by the chat template and the tokenizer of the model's folder."""
