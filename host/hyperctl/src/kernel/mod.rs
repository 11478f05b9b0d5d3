//! `hyperctl kernel`: which kernel a VM gets and what that kernel lacks, and the options of the guest kernel,
//! for building it.

mod config;
mod image;
mod options;

use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::process::ExitCode;

use hyperinit_protocol::fault::{Fault, OrFault};

pub use image::bootable;

use super::cli::Kernel;
use super::{places, standard};
use config::Config;
use options::Options;

/// Prints the report, the options, or what is wrong with a configuration.
pub fn kernel(asked: &Kernel) -> Result<ExitCode, Fault> {
    let options = Options::read()?;
    if let Some(file) = &asked.check {
        return check(&options, file);
    }
    let text = if asked.options { options.fragment() } else { report(&options, asked)? };
    standard::stdout().write_all(text.as_bytes()).fault("writing to", "standard output")?;
    Ok(ExitCode::SUCCESS)
}

/// Prints a line for every option that differs from policy/kernel; if there is one, that is a fault.
fn check(options: &Options, file: &Path) -> Result<ExitCode, Fault> {
    let text = fs::read_to_string(file).fault("reading", file.display())?;
    let violations = options.violations(&Config::parse(&text));
    if violations.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    let lines = violations.join("\n") + "\n";
    standard::stdout().write_all(lines.as_bytes()).fault("writing to", "standard output")?;
    let why = format!("{} options are not as policy/kernel asks", violations.len());
    Err(Fault::new("checking", file.display(), why))
}

/// The kernel and initramfs that a VM would have, and what that kernel cannot do for a guest.
fn report(options: &Options, asked: &Kernel) -> Result<String, Fault> {
    let boot = places::boot(asked.kernel.as_deref(), asked.initrd.as_deref())?;
    let mut text = format!("kernel: {}\n", boot.kernel.display());
    let _ = writeln!(text, "initramfs: {}", boot.initrd.display());
    let Some((place, config)) = Config::of(&boot.kernel) else {
        text.push_str(
            "configuration: not known, so neither is what it lacks: there is none in the kernel, beside it, in /boot or in /lib/modules\n",
        );
        return Ok(text);
    };
    let _ = writeln!(text, "configuration: {place}");
    for (feature, missing) in options.lacking(&config) {
        let missing: Vec<_> = missing.into_iter().collect();
        let _ = writeln!(text, "lacks {feature}: {}", missing.join(", "));
    }
    let modules = options.modules(&config);
    if !modules.is_empty() {
        let _ = writeln!(text, "has as modules, which the initramfs has to bring: {}", modules.join(", "));
    }
    Ok(text)
}
