"""What a sweep file says: its schema, the domains of its keys, its space, and how it is read and checked."""
