"""Our parameter trees in other libraries' names and shapes, and back."""
