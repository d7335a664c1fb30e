"""The HTTP process: OpenAI's image API in front of the engine. Never imports torch, knows no model by name."""
