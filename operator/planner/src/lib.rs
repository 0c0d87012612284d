//! Pure placement decisions: which node, why not, what to write next.
