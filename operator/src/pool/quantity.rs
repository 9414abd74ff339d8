//! Amounts of memory, as Kubernetes writes them.

/// A Kubernetes quantity in whole MiB.
pub(super) fn mebibytes(quantity: &str) -> Option<i64> {
    let (number, factor) = match quantity.parse::<f64>() {
        Ok(bytes) => (bytes, 1.0),
        Err(_) => {
            let split = quantity.find(|c: char| c.is_ascii_alphabetic())?;
            let (number, suffix) = quantity.split_at_checked(split)?;
            (number.parse().ok()?, bytes_of(suffix)?)
        }
    };
    let mebibytes: f64 = number * factor / 1_048_576.0;
    #[expect(clippy::cast_possible_truncation, reason = "the range is checked, and fractions of a MiB do not matter")]
    (0.0..1e12).contains(&mebibytes).then_some(mebibytes as i64)
}

fn bytes_of(suffix: &str) -> Option<f64> {
    Some(match suffix {
        "n" => 1e-9,
        "u" => 1e-6,
        "m" => 1e-3,
        "k" => 1e3,
        "M" => 1e6,
        "G" => 1e9,
        "T" => 1e12,
        "P" => 1e15,
        "E" => 1e18,
        "Ki" => 1024.0,
        "Mi" => 1024_f64.powi(2),
        "Gi" => 1024_f64.powi(3),
        "Ti" => 1024_f64.powi(4),
        "Pi" => 1024_f64.powi(5),
        "Ei" => 1024_f64.powi(6),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_amount_is_read_as_kubernetes_writes_it() {
        let amounts = [
            ("2Gi", 2048),
            ("512Mi", 512),
            ("2G", 1907),
            ("1073741824", 1024),
            ("1e9", 953),
            (".5Gi", 512),
            ("1Ki", 0),
        ];
        for (text, expected) in amounts {
            assert_eq!(mebibytes(text), Some(expected), "{text}");
        }
        for text in ["", "Gi", "1gi", "-1Gi", "1e30", "many"] {
            assert_eq!(mebibytes(text), None, "{text}");
        }
    }
}
