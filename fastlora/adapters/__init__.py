"""Named adapters on the linear layers of any model, and their files."""
