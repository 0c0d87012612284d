//! Pure agent decisions: VRAM ledger, throttle, session and fencing, worker protocol.
