//! Runs on a device that has contexts and granules, frees late and is shared with others, under wrong estimates.

use super::*;

/// A device with granules, contexts and frees that take their time.
struct Device {
    total: u64,
    foreign: u64,
    cap: u64,
    /// Name and bytes of live workers.
    live: BTreeMap<String, u64>,
    /// Bytes of ended ones and when they are given back.
    ended: Vec<(u64, Nanos)>,
}

impl Device {
    const GRANULE: u64 = 2 * MIB;

    fn granules(bytes: u64) -> u64 {
        bytes.div_ceil(Self::GRANULE) * Self::GRANULE
    }

    fn own(&self) -> Own {
        Own {
            live: Bytes(self.live.values().sum()),
            ended: Bytes(self.ended.iter().map(|(bytes, _)| bytes).sum()),
        }
    }

    fn used(&self) -> u64 {
        let Own { live, ended } = self.own();
        live.0 + ended.0 + self.foreign
    }

    fn read(&self, at: Nanos) -> Reading {
        Reading {
            at,
            total: Bytes(self.total),
            reserved: Bytes(0),
            used: Bytes(self.used()),
            own: Own::between(Some(self.own()), Some(self.own())),
            free_at_exit: false,
        }
    }

    /// Allocates for a worker; nothing where the device has no more.
    fn allocate(&mut self, name: &str, bytes: u64) -> bool {
        let fits = self.used() + bytes <= self.total;
        if fits {
            *self.live.entry(name.to_owned()).or_default() += bytes;
        }
        fits
    }

    fn end(&mut self, name: &str, at: Nanos) {
        if let Some(bytes) = self.live.remove(name) {
            self.ended.push((bytes, at));
        }
    }
}

#[test]
fn ten_thousand_runs_on_a_device_with_wrong_estimates_and_late_frees_never_pass_the_cap_or_leak() {
    let mut random = Random(11);
    let (mut loaded, mut out_of_memory, mut over_budget, mut waited) = (0_u32, 0_u32, 0_u32, 0_u32);
    for run in 0..10_000 {
        let total = Device::granules((4 + random.below(21)) * GIB);
        let mut device = Device {
            total,
            foreign: random.below(total / 2),
            cap: total * (50 + random.below(46)) / 100,
            live: BTreeMap::new(),
            ended: vec![],
        };
        let mut now = SECOND;
        let mut ledger = Ledger::default();
        ledger.observe("gpu", device.read(now));
        ledger.set_cap("gpu", Bytes(device.cap));
        // Estimate of the model, estimate of its context, whether it was loaded.
        let mut jobs: BTreeMap<String, (u64, u64, bool)> = BTreeMap::new();
        for step in 0..40 {
            now += random.below(2 * SECOND);
            device.ended.retain(|(_, at)| *at > now);
            let name = format!("job-{step}");
            let some = jobs
                .keys()
                .nth(usize::try_from(random.below(4)).unwrap())
                .cloned();
            match (random.below(8), some) {
                (0..=2, _) => {
                    let (model, context) = (64 * MIB + random.below(total), 300 * MIB);
                    match ledger.reserve("gpu", &name, Bytes(model + context)) {
                        Ok(()) => drop(jobs.insert(name, (model, context, false))),
                        Err(Shortage::Leaving { .. }) => waited += 1,
                        Err(_) => {}
                    }
                }
                (3..=4, Some(name)) if !jobs[&name].2 => {
                    if ledger.load("gpu", &name).is_err() {
                        ledger.release(now, &name);
                        jobs.remove(&name);
                        continue;
                    }
                    if random.below(4) == 0 {
                        device.foreign = random.below(total - device.used() + device.foreign + 1);
                    }
                    let (model, context, _) = jobs[&name];
                    let reserved = model + context;
                    let context = Device::granules(random.within_ten_percent(context));
                    let need = Device::granules(random.within_ten_percent(model));
                    // The worker's pool takes what its context has left of the reservation.
                    let pool = reserved.saturating_sub(context) / Device::GRANULE * Device::GRANULE;
                    let fits = context <= reserved && device.allocate(&name, context);
                    let fits = fits && need <= pool && device.allocate(&name, need);
                    if random.below(2) == 0 {
                        ledger.observe("gpu", device.read(now));
                    }
                    if fits {
                        loaded += 1;
                        ledger.commit("gpu", &name, Bytes(context + need)).unwrap();
                        jobs.insert(name, (model, context, true));
                    } else {
                        *(if need > pool {
                            &mut over_budget
                        } else {
                            &mut out_of_memory
                        }) += 1;
                        device.end(&name, now + random.below(8 * SECOND));
                        ledger.release(now, &name);
                        jobs.remove(&name);
                    }
                }
                (5, Some(name)) => {
                    device.end(&name, now + random.below(8 * SECOND));
                    ledger.release(now, &name);
                    jobs.remove(&name);
                }
                (6, _) if random.below(8) == 0 => {
                    // The agent starts anew: its workers end with it, the device gives back when it likes.
                    for name in std::mem::take(&mut jobs).into_keys() {
                        device.end(&name, now + random.below(8 * SECOND));
                    }
                    let mut fresh = Ledger::default();
                    fresh.observe("gpu", device.read(now));
                    fresh.set_cap("gpu", Bytes(device.cap));
                    ledger = fresh;
                }
                (7, _) => {
                    let most = total - (device.used() - device.foreign);
                    device.foreign = random.below(most + 1);
                }
                _ => ledger.observe("gpu", device.read(now)),
            }
            let Own { live, ended } = device.own();
            assert!(
                live.0 + ended.0 <= device.cap,
                "run {run}, step {step}: {} + {} of {}",
                live.0,
                ended.0,
                device.cap
            );
        }
        for name in jobs.keys() {
            device.end(name, now);
            ledger.release(now, name);
        }
        device.ended.clear();
        ledger.observe("gpu", device.read(now + 1));
        assert_eq!(
            (ledger.held("gpu"), ledger.foreign("gpu").0),
            (Bytes(0), device.foreign),
            "run {run} leaked"
        );
    }
    println!(
        "{loaded} loaded, {out_of_memory} out of memory, {over_budget} over their budget, {waited} waited"
    );
    assert!(loaded > 5_000 && out_of_memory > 100 && over_budget > 1_000 && waited > 100);
}
