"""Anthropic's Messages API: a translation onto the path of chats."""
