//! `hiper inspect`: what a tail, a checkpoint or a tokenised sentence holds.

use std::path::Path;

use hiper_core::{HiperFile, HiperMetadata};
use sd_models::schedulers::{PredictionType, SchedulerConfig};
use sd_models::{ClipTextConfig, ClipTokenizer, ModelFiles, UNet2DConditionConfig, Weights};
use serde_json::json;

use crate::args::Inspect;
use crate::compute::Compute;
use crate::console::Console;
use crate::{Error, Result, model};

/// `hiper inspect`.
pub fn run(args: &Inspect, compute: &Compute, console: &Console) -> Result<()> {
    let path = Path::new(&args.what);
    if path.is_dir() {
        return checkpoint(&ModelFiles::from_dir(path)?, compute, console);
    }
    if path.is_file() {
        return tail(path, console);
    }
    let text = args.what.to_str().filter(|text| !text.trim().is_empty());
    match text {
        None => Err(Error::Usage("inspect: a sentence must be valid UTF-8 and not empty".into())),
        Some(text) if is_like_a_path(text) => match model::files(Some(path)) {
            Ok(files) => checkpoint(&files, compute, console),
            Err(_) => Err(Error::refused(
                format!("{text}: no such file, folder or model in the Hugging Face cache"),
                "check the path; a sentence with spaces is tokenised",
            )),
        },
        Some(text) => sentence(text, args, console),
    }
}

fn is_like_a_path(text: &str) -> bool {
    let extension = Path::new(text).extension().is_some();
    !text.contains(char::is_whitespace) && (extension || text.contains(['/', '\\']))
}

fn tail(path: &Path, console: &Console) -> Result<()> {
    let HiperFile { tail, metadata } = HiperFile::load(path)?;
    let norms: Vec<f32> = tail.tensor().sqr()?.sum(1)?.sqrt()?.to_vec1()?;
    let (n_hiper, width) = (tail.n_hiper(), tail.width());
    let mut text = format!("{}: a HiPer tail of {n_hiper} tokens, width {width}\n", path.display());
    let HiperMetadata {
        base_model,
        base_model_hash,
        image_hash,
        source_text,
        train_steps,
        learning_rate,
        seed,
        final_loss,
    } = &metadata;
    let number = |n: &Option<f64>| n.map(|n| n.to_string());
    for (field, value) in [
        ("source text", source_text.clone()),
        ("base model", base_model.clone()),
        ("base model hash", base_model_hash.clone()),
        ("image hash", image_hash.clone()),
        ("steps", train_steps.map(|n| n.to_string())),
        ("learning rate", number(learning_rate)),
        ("seed", seed.map(|n| n.to_string())),
        ("final loss", number(final_loss)),
    ] {
        if let Some(value) = value {
            text += &format!("  {field:<16} {value}\n");
        }
    }
    for (i, norm) in norms.iter().enumerate() {
        text += &format!("  token {:<10} norm {norm:.3}\n", i + 1);
    }
    let json = json!({
        "kind": "tail", "file": path.display().to_string(), "n_hiper": n_hiper, "width": width, "norms": norms,
        "metadata": metadata,
    });
    console.report(&text, &json);
    Ok(())
}

fn checkpoint(files: &ModelFiles, compute: &Compute, console: &Console) -> Result<()> {
    let unet: UNet2DConditionConfig = files.read_config("unet/config.json")?;
    let text_encoder: ClipTextConfig = files.read_config("text_encoder/config.json")?;
    let scheduler = SchedulerConfig::load(files)?;
    let hash = files.hash()?;
    let prediction_type = match scheduler.prediction_type {
        PredictionType::Epsilon => "epsilon",
        PredictionType::VPrediction => "v_prediction",
    };
    let mut text = format!("{}: a Stable Diffusion checkpoint\n  hash {hash}\n", files.name());
    let mut components = Vec::new();
    for component in ["text_encoder", "unet", "vae"] {
        let tensors = Weights::load(files, component, &compute.device)?.tensors();
        let parameters: usize = tensors.iter().map(|(_, _, shape)| shape.iter().product::<usize>()).sum();
        let mut dtypes: Vec<String> = tensors.iter().map(|(_, dtype, _)| dtype.clone()).collect();
        dtypes.sort();
        dtypes.dedup();
        text += &format!(
            "  {component:<13} {:>9.3} million parameters in {} tensors, {}\n",
            parameters as f64 / 1e6,
            tensors.len(),
            dtypes.join(" and ")
        );
        components.push(json!({
            "component": component, "parameters": parameters, "tensors": tensors.len(), "dtypes": dtypes,
        }));
    }
    let vae: sd_models::AutoencoderKlConfig = files.read_config("vae/config.json")?;
    let side = unet.sample_size * vae.vae_scale_factor();
    text += &format!(
        "  draws {side}x{side} pixels from {}x{}x{} latents\n  text embeddings of width {}, {} tokens\n  predicts {prediction_type}, {} timesteps\n",
        unet.in_channels,
        unet.sample_size,
        unet.sample_size,
        text_encoder.hidden_size,
        text_encoder.max_position_embeddings,
        scheduler.num_train_timesteps,
    );
    let json = json!({
        "kind": "checkpoint", "name": files.name(), "hash": hash, "components": components, "size": side,
        "latent_size": unet.sample_size, "width": text_encoder.hidden_size, "tokens": text_encoder.max_position_embeddings,
        "prediction_type": prediction_type, "num_train_timesteps": scheduler.num_train_timesteps,
    });
    console.report(&text, &json);
    Ok(())
}

fn sentence(text: &str, args: &Inspect, console: &Console) -> Result<()> {
    let files = model::files(args.model.path.as_deref())?;
    let tokenizer = ClipTokenizer::load(&files)?;
    let tokens = tokenizer.encode(text)?;
    let n_hiper = usize::from(args.n_hiper);
    let head = tokens.ids.len() - n_hiper.min(tokens.ids.len());
    let used = tokens.num_tokens.min(tokens.ids.len());
    let lost = tokens.num_tokens.saturating_sub(head);
    let mut report = format!(
        "{text:?}: {} tokens; head 0..{}, tail {head}..{} ({n_hiper} tokens)\n",
        tokens.num_tokens,
        head.saturating_sub(1),
        tokens.ids.len() - 1,
    );
    let mut rows = Vec::new();
    for (position, &id) in tokens.ids.iter().enumerate() {
        let token = tokenizer.token(id).unwrap_or_default();
        let part = if position < head { "head" } else { "tail" };
        rows.push(json!({ "position": position, "id": id, "token": token, "part": part, "padding": position >= used }));
        // Padding is all alike: only its ends are worth a line.
        if position < used || position == head {
            let padding = if position >= used { "  (padding)" } else { "" };
            report += &format!("  {position:>3}  {id:>6}  {part}  {token}{padding}\n");
        } else if position == used {
            let end = if used < head { head - 1 } else { tokens.ids.len() - 1 };
            report += &format!("  {position:>3}..{end}  padding\n");
        }
    }
    if lost > 0 {
        report +=
            &format!("  the last {lost} tokens are lost: the tail has their places, or there are none\n");
    }
    let json = json!({
        "kind": "text", "text": text, "num_tokens": tokens.num_tokens, "n_hiper": n_hiper, "head": head, "lost": lost,
        "tokens": rows,
    });
    console.report(&report, &json);
    Ok(())
}
