"""The browser application: a server that streams chunks to web pages while they steer, and the page itself."""
