//! Which file of `kernels/` has a kernel. To ask a driver for it elsewhere is an error, which compute-sanitizer reports.

/// What names of kernels begin with, and their files; of two that fit the first counts.
const FILES: [(&str, &str); 16] = [
    ("adam_", "adam"),
    ("add_noise_", "random"),
    ("attention_backward_", "attention_backward"),
    ("attention_sm90a_", "attention_sm90a"),
    ("attention_", "attention"),
    ("draw_", "random"),
    ("group_norm_sm90a_", "group_norm_sm90a"),
    ("group_norm_", "group_norm"),
    ("layer_norm_", "layer_norm"),
    ("mse_loss_", "loss"),
    ("product_sm90a_", "product_sm90a"),
    ("product_", "product"),
    ("softmax_", "softmax"),
    ("sum_splits_", "attention_backward"),
    ("timestep_", "timestep"),
    ("velocity_", "random"),
];

/// Has the others.
const REST: &str = "elementwise";

/// Without its extension.
pub(super) fn file_of(kernel: &str) -> &'static str {
    FILES.iter().find(|(begin, _)| kernel.starts_with(begin)).map_or(REST, |&(_, file)| file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kernel_is_in_its_file() {
        let kernels = host_kernels::names().filter_map(|kernel| Some((kernel, host_kernels::file(kernel)?)));
        let kernels: Vec<_> = kernels.filter(|(_, file)| *file != "probes").collect();
        assert!(kernels.len() > 100);
        for (kernel, file) in kernels {
            assert_eq!(file_of(kernel), file, "{kernel}");
        }
    }
}
