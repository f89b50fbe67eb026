"""HTTP itself: servers, connections, bodies, event streams and errors; and the admin port."""
