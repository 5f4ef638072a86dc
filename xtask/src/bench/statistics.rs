//! What is said of samples.

/// The middle value; the mean of the two middle ones where there are two. None of no samples.
pub fn median(samples: &[f64]) -> Option<f64> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        n if n % 2 == 1 => Some(sorted[middle]),
        _ => Some((sorted[middle - 1] + sorted[middle]) / 2.0),
    }
}

/// The median over rounds of the ratio of medians: a machine that slows down from round to round slows both.
pub fn median_ratio(ours: &[Vec<f64>], theirs: &[Vec<f64>]) -> Option<f64> {
    let ratios: Option<Vec<f64>> =
        ours.iter().zip(theirs).map(|(a, b)| Some(median(a)? / median(b)?)).collect();
    median(&ratios?)
}

/// The last `n` samples' median over the first `n`'s: 1 where time does not drift. None of fewer than `2n` samples.
pub fn drift(samples: &[f64], n: usize) -> Option<f64> {
    let last = samples.len().checked_sub(n).filter(|&last| last >= n)?;
    Some(median(&samples[last..])? / median(&samples[..n])?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_of_odd_even_and_no_counts() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 30.0]), Some(3.0));
        assert_eq!(median(&[]), None);
    }

    #[test]
    fn ratios_are_taken_within_a_round() {
        // The machine is twice as slow in the second and third rounds; the ratio is one half in all.
        let ours = [vec![1.0, 1.1, 0.9], vec![2.0], vec![2.0]];
        let theirs = [vec![2.0], vec![4.0], vec![4.0, 4.0]];
        assert_eq!(median_ratio(&ours, &theirs), Some(0.5));
        assert_eq!(median_ratio(&ours, &[vec![], vec![], vec![]]), None);
    }

    #[test]
    fn drift_compares_the_end_with_the_beginning() {
        let samples: Vec<f64> = (0..20).map(|i| if i < 10 { 2.0 } else { 3.0 }).collect();
        assert_eq!(drift(&samples, 5), Some(1.5));
        assert_eq!(drift(&samples[..9], 5), None);
    }
}
