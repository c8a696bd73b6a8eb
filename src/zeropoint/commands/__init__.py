"""The bodies of the commands that are longer than their arguments; ``cli`` lists the commands."""
