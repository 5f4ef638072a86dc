//! Every operator, forward and gradient: time, rate, and percent of what the machine can do.

use std::time::Instant;

use anyhow::Result;
use candle_core::Var;
use hiper_benches::{Operator, Work, for_each_operator};
use serde_json::{Value, json};

use super::statistics::median;
use super::table::aligned;
use super::{ceiling, worker};

/// Measures all, saying a `ceiling` event for each kind of work and an `operator` event for each direction.
///
/// # Errors
/// When an operator cannot be made.
pub fn measure(repetitions: usize) -> Result<()> {
    worker::say(&json!({"event": "ceiling", "work": "flops", "a_second": ceiling::flops_a_second()}))?;
    worker::say(&json!({"event": "ceiling", "work": "bytes", "a_second": ceiling::bytes_a_second()}))?;
    for_each_operator(|operator: Operator| {
        let forward = time(repetitions, || operator.apply(&operator.input))?;
        report(&operator, "forward", operator.forward_work, forward)?;
        // The gradient of the sum of y, from a y already computed: with candle's ones for dy, without a forward pass.
        let x = Var::from_tensor(&operator.input)?;
        let y = operator.apply(&x)?;
        let gradient = time(repetitions, || y.backward())?;
        report(&operator, "gradient", operator.gradient_work, gradient)
    })
}

/// Seconds of each repetition after one that warms up.
fn time<T>(repetitions: usize, step: impl Fn() -> candle_core::Result<T>) -> Result<Vec<f64>> {
    step()?;
    let once = |_| {
        let started = Instant::now();
        step()?;
        Ok(started.elapsed().as_secs_f64())
    };
    (0..repetitions).map(once).collect()
}

fn report(operator: &Operator, direction: &str, work: Work, seconds: Vec<f64>) -> Result<()> {
    let (work, amount) = match work {
        Work::Flops(count) => ("flops", count),
        Work::Bytes(count) => ("bytes", count),
    };
    worker::say(&json!({
        "event": "operator", "name": operator.name, "direction": direction, "work": work, "amount": amount,
        "seconds": seconds,
    }))
}

/// The events of [`measure`] as a table, under a line with the ceilings.
pub fn table(events: &[Value]) -> String {
    let ceiling = |work: &str| {
        let said = events.iter().find(|e| e["event"] == "ceiling" && e["work"] == work);
        said.and_then(|e| e["a_second"].as_f64()).unwrap_or(f64::NAN)
    };
    let rows: Vec<Vec<String>> = events
        .iter()
        .filter(|event| event["event"] == "operator")
        .map(|event| {
            let samples: Vec<f64> =
                event["seconds"].as_array().into_iter().flatten().filter_map(Value::as_f64).collect();
            let seconds = median(&samples).unwrap_or(f64::NAN);
            let work = event["work"].as_str().unwrap_or_default();
            let rate = event["amount"].as_f64().unwrap_or(f64::NAN) / seconds;
            vec![
                event["name"].as_str().unwrap_or_default().to_owned(),
                event["direction"].as_str().unwrap_or_default().to_owned(),
                format!("{:.2}", seconds * 1e3),
                format!("{:.1} {}", rate / 1e9, unit(work)),
                format!("{:.0} %", 100.0 * rate / ceiling(work)),
            ]
        })
        .collect();
    let heading = ["operator", "direction", "ms", "rate", "of the ceiling"].map(String::from);
    format!(
        "Ceilings: {:.0} GFLOP/s in registers, {:.1} GB/s from memory. Operations are the direct algorithm's (Winograd \
         does with fewer); bytes are one pass over each tensor (small ones stay in caches).\n\n{}",
        ceiling("flops") / 1e9,
        ceiling("bytes") / 1e9,
        aligned(&heading, &rows)
    )
}

fn unit(work: &str) -> &'static str {
    if work == "bytes" { "GB/s" } else { "GFLOP/s" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_and_percentages_come_from_the_median() {
        let events = [
            json!({"event": "ceiling", "work": "flops", "a_second": 2e11}),
            json!({"event": "ceiling", "work": "bytes", "a_second": 5e10}),
            json!({"event": "operator", "name": "conv", "direction": "forward", "work": "flops", "amount": 1_000_000_000u64,
                "seconds": [0.5, 0.01, 0.01]}),
        ];
        let table = table(&events);
        assert!(table.starts_with("Ceilings: 200 GFLOP/s in registers, 50.0 GB/s"), "{table}");
        assert!(
            table.contains("| conv     | forward   | 10.00 | 100.0 GFLOP/s | 50 %           |"),
            "{table}"
        );
    }
}
