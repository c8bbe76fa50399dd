"""Operations that belong together in one pass over memory: norm and gate, gated products, head and cross-entropy."""
