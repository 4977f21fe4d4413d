"""The side of the nodes: a device's turns, an edge's branches."""
