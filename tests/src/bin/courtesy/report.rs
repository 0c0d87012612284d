//! The figures, as JSON and as a table.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::foreground::{Kind, Measured};

/// What GoGrid does meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Mode {
    Alone,
    With,
    Unlimited,
}

impl Mode {
    pub(crate) const ALL: [Self; 3] = [Self::Alone, Self::With, Self::Unlimited];
}

/// One figure for each mode.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(crate) struct Triple {
    alone: f64,
    with: f64,
    unlimited: f64,
}

impl Triple {
    fn of(figure: impl Fn(Mode) -> f64) -> Self {
        Self {
            alone: figure(Mode::Alone),
            with: figure(Mode::With),
            unlimited: figure(Mode::Unlimited),
        }
    }

    /// Percent of the work alone that is lost.
    fn loss(&self) -> (f64, f64) {
        let loss = |rate: f64| 100.0 * (1.0 - rate / self.alone);
        (loss(self.with), loss(self.unlimited))
    }
}

/// One round of one kind.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Round {
    kind: &'static str,
    #[serde(flatten)]
    rate: Triple,
}

/// How much of its share GoGrid takes with the machine to itself.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Share {
    pub(crate) requested_percent: f64,
    pub(crate) mean_percent: f64,
    pub(crate) worst1s_points: f64,
    pub(crate) worst10s_points: f64,
    pub(crate) windows_excluded: usize,
}

#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Gap {
    pub(crate) requested: u64,
    pub(crate) min: Option<f64>,
}

#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ThreadsReport {
    pub(crate) total: u64,
    pub(crate) nice_ok: u64,
    pub(crate) ioprio_ok: u64,
}

/// Nothing, where no adaptive law acts.
#[derive(Clone, Copy, Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Adaptive {
    pub(crate) yield_millis: Option<u64>,
    pub(crate) resume_millis: Option<u64>,
    pub(crate) reversals_per_minute: Option<f64>,
}

/// Everything.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Report {
    pub(crate) profile: String,
    pub(crate) arrangement: &'static str,
    pub(crate) rounds: Vec<Round>,
    pub(crate) foreground: BTreeMap<&'static str, Triple>,
    #[serde(rename = "wakesOver1ms")]
    pub(crate) wakes: Triple,
    pub(crate) share: Share,
    pub(crate) gap_millis: Gap,
    pub(crate) threads: ThreadsReport,
    pub(crate) adaptive: Adaptive,
    pub(crate) steal_percent: f64,
}

/// Measurements by kind, mode and round.
#[derive(Default)]
pub(crate) struct Collected(BTreeMap<(Kind, Mode), Vec<Measured>>);

impl Collected {
    pub(crate) fn add(&mut self, kind: Kind, mode: Mode, measured: Measured) {
        self.0.entry((kind, mode)).or_default().push(measured);
    }

    fn of(&self, kind: Kind, mode: Mode) -> &[Measured] {
        self.0.get(&(kind, mode)).map_or(&[], Vec::as_slice)
    }

    /// Every round as it was.
    pub(crate) fn rounds(&self) -> Vec<Round> {
        let count = Kind::ALL
            .map(|kind| self.of(kind, Mode::Alone).len())
            .into_iter()
            .max();
        let one = |round, kind| Round {
            kind: Kind::name(kind),
            rate: Triple::of(|mode| self.of(kind, mode).get(round).map_or(0.0, |m: &Measured| m.rate)),
        };
        (0..count.unwrap_or(0))
            .flat_map(|round| Kind::ALL.map(|kind| one(round, kind)))
            .collect()
    }

    /// Medians of work per second.
    pub(crate) fn medians(&self) -> BTreeMap<&'static str, Triple> {
        let rate = |kind, mode| median(self.of(kind, mode).iter().map(|m| m.rate).collect());
        Kind::ALL
            .map(|kind| (kind.name(), Triple::of(|mode| rate(kind, mode))))
            .into()
    }

    /// Share of wakes that came more than a millisecond late while both cores were busy with the foreground.
    pub(crate) fn wakes(&self) -> Triple {
        Triple::of(|mode| {
            let all = self.of(Kind::Alu, mode);
            let sum = |count: &dyn Fn(&Measured) -> u64| -> f64 {
                f64::from(u32::try_from(all.iter().map(count).sum::<u64>()).unwrap_or(u32::MAX))
            };
            sum(&|m| m.late) / sum(&|m| m.wakes).max(1.0)
        })
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match (values.get(middle), values.len() % 2) {
        (Some(value), 1) => *value,
        (Some(value), _) => {
            let below = middle.checked_sub(1).and_then(|below| values.get(below));
            below.map_or(*value, |below| (below + value) / 2.0)
        }
        (None, _) => 0.0,
    }
}

impl Report {
    /// For people.
    pub(crate) fn print(&self) {
        println!("profile {}, foreground {}", self.profile, self.arrangement);
        println!("                    alone        with GoGrid           unlimited GoGrid");
        for (kind, rates) in &self.foreground {
            let (with, unlimited) = rates.loss();
            println!(
                "{kind:<8} work/s {:>10.1}  {:>10.1} ({with:>5.1} % lost)  {:>10.1} ({unlimited:>5.1} % lost)",
                rates.alone, rates.with, rates.unlimited
            );
        }
        let per_cent = |share: f64| share * 100.0;
        println!(
            "wakes > 1 ms    {:>9.2} %  {:>9.2} %                {:>9.2} %",
            per_cent(self.wakes.alone),
            per_cent(self.wakes.with),
            per_cent(self.wakes.unlimited)
        );
        let Share {
            requested_percent,
            mean_percent,
            worst1s_points,
            worst10s_points,
            windows_excluded,
        } = self.share;
        println!(
            "share by itself {mean_percent:.1} % of {requested_percent:.0} %; worst window {worst1s_points:.1} points \
             (1 s), {worst10s_points:.1} points (10 s); {windows_excluded} windows excluded"
        );
        let least = self
            .gap_millis
            .min
            .map_or("-".to_owned(), |gap| format!("{gap:.1}"));
        println!(
            "starts          at least {least} ms apart, {} ms asked",
            self.gap_millis.requested
        );
        let ThreadsReport {
            total,
            nice_ok,
            ioprio_ok,
        } = self.threads;
        println!(
            "threads         {nice_ok} of {total} at the nice value asked, {ioprio_ok} at the I/O class"
        );
        println!("steal           {:.1} %", self.steal_percent);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_an_even_number_of_rounds_lies_between_the_middle_ones() {
        assert!((median(vec![4.0, 1.0, 2.0, 9.0]) - 3.0).abs() < 1e-9);
        assert!((median(vec![9.0, 1.0, 2.0]) - 2.0).abs() < 1e-9);
    }
}
