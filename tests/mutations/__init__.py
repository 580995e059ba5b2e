"""One module per file of `validate/checks/`, each with its MUTATIONS."""
