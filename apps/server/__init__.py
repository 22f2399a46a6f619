"""The OpenAI-compatible server: `create_app(host, settings)` in app.py over a `ModelHost`; serving.py runs it."""
