"""What lies on a stick for a room without a network; ``classroom.bundle`` packs it."""
