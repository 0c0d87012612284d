//! A million random operations against a plain list of what they should have left.

use super::*;

/// What the operations should have left, kept as a plain list.
struct Model {
    cap: u64,
    foreign: u64,
    /// Held by workers of an agent before this one.
    old: u64,
    held: BTreeMap<usize, (u64, bool)>,
}

impl Model {
    fn sum(&self) -> u64 {
        self.held.values().map(|(bytes, _)| bytes).sum::<u64>() + self.old
    }

    fn reading(&self, total: u64) -> Reading {
        let own = Own {
            live: Bytes(0),
            ended: Bytes(self.old),
        };
        Reading {
            own: Some(own),
            ..reading(total, self.foreign + self.old)
        }
    }
}

#[test]
fn a_million_random_operations_never_lift_a_device_above_its_cap_and_leave_nothing_behind() {
    const TOTAL: u64 = 1_000;
    let mut random = Random(7);
    let names: Vec<String> = (0..12).map(|n| format!("job-{n}")).collect();
    let (mut operations, mut given, mut refused, mut restarts) = (0_u32, 0_u32, 0_u32, 0_u32);
    while operations < 1_000_000 {
        let devices: Vec<String> = (0..=random.below(8)).map(|d| format!("gpu-{d}")).collect();
        let mut ledger = Ledger::default();
        let mut models: Vec<Model> = vec![];
        for device in &devices {
            let cap = random.below(TOTAL + 1);
            ledger.observe(device, reading(TOTAL, 0));
            ledger.set_cap(device, Bytes(cap));
            models.push(Model {
                cap,
                foreign: 0,
                old: 0,
                held: BTreeMap::new(),
            });
        }
        for _ in 0..500 {
            operations += 1;
            let d = usize::try_from(random.below(u64::try_from(devices.len()).unwrap())).unwrap();
            let who = usize::try_from(random.below(12)).unwrap();
            let (device, name, bytes) = (&devices[d], &names[who], 1 + random.below(400));
            let model = &mut models[d];
            let room = model.cap.min(TOTAL - model.foreign);
            match random.below(9) {
                0..=2 => {
                    let fits = !model.held.contains_key(&who) && model.sum() + bytes <= room;
                    let got = ledger.reserve(device, name, Bytes(bytes));
                    assert_eq!(got.is_ok(), fits, "{got:?}");
                    if fits {
                        model.held.insert(who, (bytes, false));
                        given += 1;
                    } else {
                        refused += 1;
                    }
                    // Another one races for what is left, and a byte more.
                    let rival = (who + 1) % 12;
                    if !model.held.contains_key(&rival) {
                        let left = room.saturating_sub(model.sum());
                        assert!(ledger.reserve(device, &names[rival], Bytes(left + 1)).is_err());
                        assert_eq!(ledger.free(device), Bytes(left));
                    }
                }
                3 => {
                    let fits = model.held.contains_key(&who) && model.sum() <= room;
                    assert_eq!(ledger.load(device, name).is_ok(), fits);
                    if let Some(holding) = model.held.get_mut(&who).filter(|_| fits) {
                        holding.1 = true;
                    }
                }
                4 => {
                    let old = model.held.get(&who).map(|h| h.0);
                    let fits = old.is_some_and(|old| bytes <= old || model.sum() - old + bytes <= room);
                    assert_eq!(ledger.commit(device, name, Bytes(bytes)).is_ok(), fits);
                    if fits {
                        model.held.insert(who, (bytes, false));
                    }
                }
                5 => {
                    ledger.release(0, name);
                    for model in &mut models {
                        model.held.remove(&who);
                    }
                }
                6 => {
                    let known = model.foreign;
                    model.foreign = random.below(TOTAL);
                    if random.below(3) == 0 {
                        model.old = 0;
                    }
                    ledger.observe(device, model.reading(TOTAL));
                    if model.held.values().any(|(_, loading)| *loading) {
                        model.foreign = known;
                    }
                }
                7 => {
                    model.cap = random.below(TOTAL + 1);
                    ledger.set_cap(device, Bytes(model.cap));
                }
                _ if operations.is_multiple_of(16) => {
                    // The agent starts anew: the old session's bytes count until the device shows them gone.
                    restarts += 1;
                    let mut fresh = Ledger::default();
                    for (device, model) in devices.iter().zip(&mut models) {
                        model.old = model.sum();
                        model.held.clear();
                        fresh.observe(device, model.reading(TOTAL));
                        fresh.set_cap(device, Bytes(model.cap));
                    }
                    ledger = fresh;
                }
                _ => {}
            }
            for (device, model) in devices.iter().zip(&models) {
                assert_eq!(ledger.held(device), Bytes(model.sum()));
            }
        }
        ledger.keep_only(0, |_| false);
        for device in &devices {
            ledger.observe(device, reading(TOTAL, 0));
        }
        assert!(
            devices.iter().all(|device| ledger.held(device) == Bytes(0)),
            "leaked"
        );
    }
    assert!(
        given > 50_000 && refused > 50_000 && restarts > 1_000,
        "{given} given, {refused} refused, {restarts} restarts"
    );
}
