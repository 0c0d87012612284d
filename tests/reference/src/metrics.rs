//! A program's metrics as a page.

use crate::{cell, heading};
use prometheus::core::Collector;
use prometheus::proto::MetricType;

/// The page of everything that `program` exports; `source` is where the metrics are made.
///
/// A histogram with labels shows its buckets only if one of its children exists.
pub fn metrics_page(program: &str, source: &str, collectors: &[Box<dyn Collector>]) -> String {
    let mut page = heading(&format!("Metrics of {program}"), source);
    page += "| metric | type | labels | what |\n| --- | --- | --- | --- |\n";
    let mut rows: Vec<String> = collectors.iter().flat_map(|c| rows(c.as_ref())).collect();
    rows.sort();
    page + &rows.concat()
}

fn rows(collector: &dyn Collector) -> Vec<String> {
    let labels: Vec<Vec<String>> = collector
        .desc()
        .iter()
        .map(|desc| {
            let constant = desc.const_label_pairs.iter().map(|pair| pair.name().to_owned());
            constant.chain(desc.variable_labels.iter().cloned()).collect()
        })
        .collect();
    let families = collector.collect();
    families
        .iter()
        .zip(labels)
        .map(|(family, labels)| {
            let kind = match family.get_field_type() {
                MetricType::COUNTER => "counter",
                MetricType::GAUGE => "gauge",
                MetricType::HISTOGRAM => "histogram",
                MetricType::SUMMARY => "summary",
                MetricType::UNTYPED => "untyped",
            };
            let bounds: Vec<String> = family
                .get_metric()
                .first()
                .filter(|_| kind == "histogram")
                .map(|metric| metric.get_histogram().get_bucket().to_vec())
                .unwrap_or_default()
                .iter()
                .map(|bucket| bucket.upper_bound().to_string())
                .filter(|bound| bound != "inf")
                .collect();
            let buckets = if bounds.is_empty() {
                String::new()
            } else {
                format!(" Buckets: {}.", bounds.join(", "))
            };
            let labels: Vec<String> = labels.iter().map(|label| format!("`{label}`")).collect();
            format!(
                "| `{}` | {kind} | {} | {}{buckets} |\n",
                family.name(),
                labels.join(", "),
                cell(family.help())
            )
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use prometheus::{Histogram, HistogramOpts, IntCounterVec, Opts};

    #[test]
    fn a_metric_shows_type_labels_and_buckets_before_it_was_ever_touched() {
        let counter = IntCounterVec::new(Opts::new("b_total", "Things."), &["kind", "result"]).unwrap();
        let histogram =
            Histogram::with_opts(HistogramOpts::new("a_seconds", "Times.").buckets(vec![0.5, 2.0])).unwrap();
        let page = metrics_page("p", "here", &[Box::new(counter), Box::new(histogram)]);
        let rows: Vec<&str> = page.lines().skip(6).collect();
        assert_eq!(
            rows,
            [
                "| `a_seconds` | histogram |  | Times. Buckets: 0.5, 2. |",
                "| `b_total` | counter | `kind`, `result` | Things. |"
            ]
        );
    }
}
