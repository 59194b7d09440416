"""What runs a call: the two verbs in every backend, and the choice among them."""
