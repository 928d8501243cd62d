"""One branch on its way to others: the export, its model card, and pushes to the Hub."""
