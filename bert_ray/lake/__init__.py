"""Tables of text: what there is to do (tables, units), what has been done (journal), what is written (outputs)."""
