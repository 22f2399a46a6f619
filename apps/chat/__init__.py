"""The desktop chat: a local server, a page without a build step, conversations as trees in SQLite.

`launcher.run` is the way in; `app.create_app` makes the ASGI application; `web/` holds the page.
"""
