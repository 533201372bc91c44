"""Ray Data: read -> normalise -> render and mask -> tokenise -> Parquet, with a ledger of every row left out."""
