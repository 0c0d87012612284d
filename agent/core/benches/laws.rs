//! What one decision costs: the gate, the share meter and the ledger, uncontended.

#![allow(missing_docs, clippy::unwrap_used, reason = "a benchmark ends by panicking")]

use criterion::{Criterion, criterion_group, criterion_main};
use gogrid_agent_core::throttle::{Grant, RequestGate, ShareMeter};
use gogrid_agent_core::vram::{Ledger, Own, Reading};
use gogrid_api::Bytes;
use std::hint::black_box;

fn ledger() -> Ledger {
    let mut ledger = Ledger::default();
    for device in ["GPU-0", "GPU-1", "GPU-2", "GPU-3"] {
        let reading = Reading {
            at: 0,
            total: Bytes(24 << 30),
            reserved: Bytes(512 << 20),
            used: Bytes(1 << 30),
            own: Some(Own::default()),
            free_at_exit: false,
        };
        ledger.observe(device, reading);
        ledger.set_cap(device, Bytes(20 << 30));
        for job in 0..4 {
            ledger
                .reserve(device, &format!("{device}-job-{job}"), Bytes(1 << 30))
                .unwrap();
        }
    }
    ledger
}

fn decisions(criterion: &mut Criterion) {
    criterion.bench_function("permit: ready and bill", |bencher| {
        let mut meter = ShareMeter::default();
        let grant = Grant {
            share_permille: 1000,
            expires_at: u64::MAX,
            fence_at: u64::MAX,
        };
        meter.set_grant(0, grant);
        let mut now = 0;
        bencher.iter(|| {
            now += 1_000;
            let ready = meter.ready_at(black_box(now));
            meter.bill(now, black_box(500));
            ready
        });
    });
    criterion.bench_function("gate: reserve and start", |bencher| {
        let mut gate = RequestGate::new(10);
        let mut now = 0;
        bencher.iter(|| {
            now += 20;
            let slot = gate.reserve(black_box(now)).slot;
            gate.start(slot, now)
        });
    });
    criterion.bench_function("ledger: reserve and release, 4 devices of 4 jobs", |bencher| {
        let mut ledger = ledger();
        bencher.iter(|| {
            let given = ledger.reserve(black_box("GPU-2"), "job", Bytes(1 << 20));
            ledger.release(1, "job");
            given
        });
    });
}

criterion_group!(benches, decisions);
criterion_main!(benches);
