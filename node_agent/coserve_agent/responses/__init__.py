"""OpenAI's Responses API, without a store: a translation onto the path of chats."""
