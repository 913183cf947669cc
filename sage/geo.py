from collections import namedtuple
import numpy as np
from pyproj import Transformer
from scipy.spatial import cKDTree
from sage.core import UserError
Neighbors=namedtuple('Neighbors','indptr indices distances')
def utm_zone(lat,lon): return f'{int((lon+180)//6)%60+1}{"N" if lat>=0 else "S"}'
def _t(zone): return Transformer.from_crs(4326,(32600 if zone[-1]=='N' else 32700)+int(zone[:-1]),always_xy=True)
def to_utm(lat,lon,zone=None):
    lat,lon=np.asarray(lat,float),np.asarray(lon,float); zone=zone or utm_zone(np.median(lat),np.median(lon))
    e,n=_t(zone).transform(lon,lat); return np.asarray(e),np.asarray(n),zone
def to_latlon(e,n,zone):
    lon,lat=_t(zone).transform(np.asarray(e,float),np.asarray(n,float),direction='INVERSE'); return np.asarray(lat),np.asarray(lon)
def check_latlon(lat,lon,source=''):
    lat,lon=np.asarray(lat,float),np.asarray(lon,float)
    bad=~((abs(lat)<=90)&(abs(lon)<=180))
    if bad.any(): raise UserError(f'{source} row {bad.argmax()}: lat/lon out of range; latitude and longitude may be swapped')
def radius_neighbors(xy,radius,queries=None,inclusive=False):
    xy=np.asarray(xy,float); q=xy if queries is None else np.asarray(queries,float)
    l=cKDTree(xy).query_ball_point(q,radius,return_sorted=True)
    rows=np.repeat(np.arange(len(q)),[len(x) for x in l]); idx=np.concatenate([np.asarray(x,int) for x in l]) if len(q) else np.zeros(0,int)
    d=np.hypot(*(q[rows]-xy[idx]).T); keep=(d<=radius) if inclusive else (d<radius)
    if queries is None: keep&=rows!=idx
    rows,idx,d=rows[keep],idx[keep],d[keep]
    return Neighbors(np.r_[0,np.cumsum(np.bincount(rows,minlength=len(q)))],idx,d)
