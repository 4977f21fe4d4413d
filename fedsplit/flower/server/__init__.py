"""The server's side of a round: runs plans over Flower; imports nothing of the nodes' side."""
