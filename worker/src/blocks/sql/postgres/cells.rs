//! The server's binary values. What has no form here is asked for as text instead, so that nothing is guessed.

use std::error::Error;
use std::net::IpAddr;

use tokio_postgres::Statement;
use tokio_postgres::types::{FromSql, Kind, Type};

use crate::blocks::sql::rows::Cell;

/// A value as it came.
pub(super) struct Raw<'a>(pub(super) &'a [u8]);

impl<'a> FromSql<'a> for Raw<'a> {
    fn from_sql(_: &Type, raw: &'a [u8]) -> Result<Self, Box<dyn Error + Sync + Send>> {
        Ok(Self(raw))
    }

    fn accepts(_: &Type) -> bool {
        true
    }
}

/// The same query with the columns cast to text whose binary form is not known here; none where all are known.
pub(super) fn as_text(statement: &Statement, text: &str) -> Option<String> {
    let columns = statement.columns();
    if columns.iter().all(|column| is_known(column.type_())) {
        return None;
    }
    let names: Vec<_> = (1..=columns.len()).map(|number| format!("c{number}")).collect();
    let casts: Vec<_> = names
        .iter()
        .zip(columns)
        .map(|(name, column)| {
            let cast = match column.type_().kind() {
                _ if is_known(column.type_()) => "",
                Kind::Array(_) => "::text[]",
                _ => "::text",
            };
            format!("{name}{cast} AS \"{}\"", column.name().replace('"', "\"\""))
        })
        .collect();
    // The line's end closes a comment at the end of the text.
    Some(format!("SELECT {} FROM ({text}\n) AS q({})", casts.join(", "), names.join(", ")))
}

fn is_known(ty: &Type) -> bool {
    match ty.kind() {
        Kind::Array(element) => !matches!(element.kind(), Kind::Array(_)) && is_known(element),
        Kind::Enum(_) => true,
        _ => matches!(
            *ty,
            Type::BOOL
                | Type::INT2
                | Type::INT4
                | Type::INT8
                | Type::OID
                | Type::FLOAT4
                | Type::FLOAT8
                | Type::NUMERIC
                | Type::TEXT
                | Type::VARCHAR
                | Type::BPCHAR
                | Type::NAME
                | Type::UNKNOWN
                | Type::BYTEA
                | Type::JSON
                | Type::JSONB
                | Type::UUID
                | Type::INET
                | Type::CIDR
                | Type::DATE
                | Type::TIME
                | Type::TIMESTAMP
                | Type::TIMESTAMPTZ
        ),
    }
}

/// One value of a known type; bytes where it is not what its type says.
pub(super) fn cell<'a>(raw: Option<&'a [u8]>, ty: &Type) -> Cell<'a> {
    raw.map_or(Cell::Null, |raw| decode(raw, ty).unwrap_or(Cell::Bytes(raw)))
}

fn decode<'a>(raw: &'a [u8], ty: &Type) -> Option<Cell<'a>> {
    if let Kind::Array(element) = ty.kind() {
        return array(raw, element);
    }
    Some(match *ty {
        Type::BOOL => Cell::Bool(raw.first()? != &0),
        Type::INT2 => Cell::Integer(i16::from_be_bytes(raw.try_into().ok()?).into()),
        Type::INT4 => Cell::Integer(i32::from_be_bytes(raw.try_into().ok()?).into()),
        Type::INT8 => Cell::Integer(int8(raw)?.into()),
        Type::OID => Cell::Integer(u32::from_be_bytes(raw.try_into().ok()?).into()),
        Type::FLOAT4 => Cell::real32(f32::from_be_bytes(raw.try_into().ok()?)),
        Type::FLOAT8 => Cell::Real(f64::from_be_bytes(raw.try_into().ok()?)),
        Type::NUMERIC => Cell::Text(numeric(raw)?.into()),
        Type::BYTEA => Cell::Bytes(raw),
        Type::JSON => Cell::Json(std::str::from_utf8(raw).ok()?),
        // A version stands before the text.
        Type::JSONB => Cell::Json(std::str::from_utf8(raw.get(1..)?).ok()?),
        Type::UUID => Cell::Text(uuid(raw)?.into()),
        Type::INET | Type::CIDR => Cell::Text(network(raw)?.into()),
        Type::DATE => Cell::Text(date(i32::from_be_bytes(raw.try_into().ok()?)).into()),
        Type::TIME => Cell::Text(time(int8(raw)?).into()),
        Type::TIMESTAMP => Cell::Text(timestamp(int8(raw)?, "").into()),
        Type::TIMESTAMPTZ => Cell::Text(timestamp(int8(raw)?, "Z").into()),
        _ => Cell::text(raw),
    })
}

fn int8(raw: &[u8]) -> Option<i64> {
    Some(i64::from_be_bytes(raw.try_into().ok()?))
}

/// Takes a number off the front.
fn take<const N: usize>(raw: &mut &[u8]) -> Option<[u8; N]> {
    let (number, rest) = raw.split_first_chunk::<N>()?;
    *raw = rest;
    Some(*number)
}

/// Dimensions, a flag for NULLs, the element's type; then length and lower bound of each dimension; then the elements.
fn array<'a>(mut raw: &'a [u8], element: &Type) -> Option<Cell<'a>> {
    let dimensions = i32::from_be_bytes(take(&mut raw)?);
    let _ = (take::<4>(&mut raw)?, take::<4>(&mut raw)?);
    let mut lengths = Vec::new();
    for _ in 0..dimensions {
        lengths.push(usize::try_from(i32::from_be_bytes(take(&mut raw)?)).ok()?);
        take::<4>(&mut raw)?;
    }
    // Each element has at least its length: a server that says else must not make us count.
    let elements = lengths.iter().try_fold(1_usize, |product, length| product.checked_mul(*length))?;
    match elements {
        elements if elements == 0 || lengths.is_empty() => Some(Cell::Array(Vec::new())),
        elements if elements > raw.len() / 4 => None,
        _ => dimension(&mut raw, &lengths, element),
    }
}

fn dimension<'a>(raw: &mut &'a [u8], lengths: &[usize], element: &Type) -> Option<Cell<'a>> {
    let Some((length, inner)) = lengths.split_first() else {
        let Ok(length) = usize::try_from(i32::from_be_bytes(take(raw)?)) else {
            return Some(Cell::Null);
        };
        let (value, rest) = raw.split_at_checked(length)?;
        *raw = rest;
        return decode(value, element);
    };
    (0..*length).map(|_| dimension(raw, inner, element)).collect::<Option<_>>().map(Cell::Array)
}

/// Groups of four digits, the place of the first, the sign, and how many digits of the fraction are shown.
fn numeric(mut raw: &[u8]) -> Option<String> {
    let count = u16::from_be_bytes(take(&mut raw)?);
    let weight = i32::from(i16::from_be_bytes(take(&mut raw)?));
    let sign = u16::from_be_bytes(take(&mut raw)?);
    let scale = usize::from(u16::from_be_bytes(take(&mut raw)?));
    let sign = match sign {
        0x0000 => "",
        0x4000 => "-",
        0xc000 => return Some("NaN".to_owned()),
        0xd000 => return Some("Infinity".to_owned()),
        0xf000 => return Some("-Infinity".to_owned()),
        _ => return None,
    };
    let groups: Vec<u16> = (0..count).map(|_| take(&mut raw).map(u16::from_be_bytes)).collect::<Option<_>>()?;
    let group = |place: i32| usize::try_from(weight - place).ok().and_then(|at| groups.get(at)).copied().unwrap_or(0);
    let whole: String = (0..=weight.max(0)).rev().map(|place| format!("{:04}", group(place))).collect();
    let whole = match whole.trim_start_matches('0') {
        "" => "0",
        digits => digits,
    };
    let places = i32::try_from(scale.div_ceil(4)).ok()?;
    let mut fraction: String = (1..=places).map(|place| format!("{:04}", group(-place))).collect();
    fraction.truncate(scale);
    let point = if scale > 0 { "." } else { "" };
    Some(format!("{sign}{whole}{point}{fraction}"))
}

fn uuid(raw: &[u8]) -> Option<String> {
    let number = u128::from_be_bytes(raw.try_into().ok()?);
    let hex = format!("{number:032x}");
    let part = |from, to| hex.get(from..to).unwrap_or_default();
    Some(format!("{}-{}-{}-{}-{}", part(0, 8), part(8, 12), part(12, 16), part(16, 20), part(20, 32)))
}

/// Family, bits of the mask, whether it is a network, length, address. A host's full mask is not shown; a cast to text
/// would show it.
fn network(raw: &[u8]) -> Option<String> {
    let (&[_, bits, is_network, _], address) = raw.split_first_chunk::<4>()?;
    let address: IpAddr = match address.len() {
        4 => <[u8; 4]>::try_from(address).ok()?.into(),
        _ => <[u8; 16]>::try_from(address).ok()?.into(),
    };
    let is_host = is_network == 0 && bits == if address.is_ipv4() { 32 } else { 128 };
    Some(if is_host { address.to_string() } else { format!("{address}/{bits}") })
}

const DAY_MICROS: i64 = 86_400_000_000;

/// Days since 2000-01-01.
fn date(days: i32) -> String {
    match days {
        i32::MAX => "infinity".to_owned(),
        i32::MIN => "-infinity".to_owned(),
        days => day(days.into()),
    }
}

/// Microseconds since 2000-01-01.
fn timestamp(micros: i64, zone: &str) -> String {
    match micros {
        i64::MAX => "infinity".to_owned(),
        i64::MIN => "-infinity".to_owned(),
        micros => format!("{}T{}{zone}", day(micros.div_euclid(DAY_MICROS)), time(micros.rem_euclid(DAY_MICROS))),
    }
}

/// Microseconds since midnight.
fn time(micros: i64) -> String {
    let (seconds, fraction) = (micros / 1_000_000, micros % 1_000_000);
    let text = format!("{:02}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60);
    match fraction {
        0 => text,
        fraction => format!("{text}.{}", format!("{fraction:06}").trim_end_matches('0')),
    }
}

/// A day as ISO 8601 writes it: the year before 1 is 0, and years of more than four digits have a sign.
fn day(days_since_2000: i64) -> String {
    // Howard Hinnant's days_from_civil, backwards: years begin in March, so that the leap day is the last.
    let days = days_since_2000 + 730_425;
    let era = days.div_euclid(146_097);
    let day_of_era = days.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let (month, next) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    match year_of_era + era * 400 + next {
        year @ 0..=9999 => format!("{year:04}-{month:02}-{day:02}"),
        year => format!("{year:+07}-{month:02}-{day:02}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_are_those_of_the_calendar() {
        let cases = [
            (0, "2000-01-01"),
            (-10_957, "1970-01-01"),
            (59, "2000-02-29"),
            (60, "2000-03-01"),
            (8_827, "2024-03-02"),
            (-730_119, "0001-01-01"),
            (-730_120, "0000-12-31"),
            (2_921_939, "9999-12-31"),
            (2_921_940, "+010000-01-01"),
            (-2_451_545, "-004713-11-24"),
        ];
        for (days, expected) in cases {
            assert_eq!(day(days), expected, "{days}");
        }
        assert_eq!(timestamp(-1, "Z"), "1999-12-31T23:59:59.999999Z");
        assert_eq!(timestamp(1_500_000, ""), "2000-01-01T00:00:01.5");
    }

    #[test]
    fn a_numeric_keeps_all_its_digits() {
        let numeric = |weight: i16, sign: u16, scale: u16, groups: &[u16]| {
            let count = u16::try_from(groups.len()).unwrap().to_be_bytes();
            let mut raw = [count, weight.to_be_bytes(), sign.to_be_bytes(), scale.to_be_bytes()].concat();
            raw.extend(groups.iter().flat_map(|group| group.to_be_bytes()));
            numeric(&raw).unwrap()
        };
        assert_eq!(numeric(0, 0, 0, &[]), "0");
        assert_eq!(numeric(0, 0, 2, &[]), "0.00");
        assert_eq!(numeric(1, 0x4000, 0, &[1]), "-10000");
        assert_eq!(numeric(0, 0, 3, &[12, 3400]), "12.340");
        assert_eq!(numeric(-1, 0, 4, &[5]), "0.0005");
        assert_eq!(numeric(-2, 0, 8, &[5]), "0.00000005");
        assert_eq!(numeric(2, 0, 1, &[1, 0, 7, 5000]), "100000007.5");
        assert_eq!(numeric(0, 0xc000, 0, &[]), "NaN");
    }

    #[test]
    fn a_value_that_is_not_what_its_type_says_breaks_nothing() {
        let types = [
            Type::BOOL,
            Type::INT4,
            Type::NUMERIC,
            Type::UUID,
            Type::INET,
            Type::JSONB,
            Type::INT4_ARRAY,
            Type::TIMESTAMP,
        ];
        for ty in types {
            for length in 0..40 {
                for byte in [0_u8, 1, 0x7f, 0xff] {
                    let _ = cell(Some(&vec![byte; length]), &ty);
                }
            }
        }
    }
}
